-- role, incarnation, value, lease, renewal. Gives a number that changes when these records were lost.
local now, lease = clock(), tonumber(ARGV[4])
if not is_continuous(lease, now) then
  redis.call('HSET', base .. 'state', 'settling', now + 2 * tonumber(ARGV[5]))
end
redis.call('HSET', base .. 'state', 'renewed', now)
redis.call('HSETNX', base .. 'state', 'mark', now)
redis.call('HSET', base .. ARGV[1], ARGV[2], string.format('%.0f ', now) .. ARGV[3])
return tonumber(redis.call('HGET', base .. 'state', 'mark'))
