-- role, incarnation, value, lease, renewal. Gives a number that changes when these records were lost, and 1 when the lease had
-- ended, or had not been there.
local now, lease = clock(), tonumber(ARGV[4])
if not is_continuous(lease, now) then
  redis.call('HSET', base .. 'state', 'settling', now + 2 * tonumber(ARGV[5]))
end
redis.call('HSET', base .. 'state', 'renewed', now)
redis.call('HSETNX', base .. 'state', 'mark', now)
local before = redis.call('HGET', base .. ARGV[1], ARGV[2])
local lapsed = not before or now - parts(before) > lease
redis.call('HSET', base .. ARGV[1], ARGV[2], string.format('%.0f ', now) .. ARGV[3])
return { tonumber(redis.call('HGET', base .. 'state', 'mark')), lapsed and 1 or 0 }
