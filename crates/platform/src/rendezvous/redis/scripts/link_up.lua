-- replica, incarnation, assumed. Gives generation and time, the link before, and who waits; nothing when another replica's link is
-- newer than is assumed, where something is.
local now = clock()
local before = link()
local known, assumed = tonumber(before[2]) or 0, tonumber(ARGV[3])
if assumed and before[1] and known > assumed and not string.find(before[1], ARGV[2], 1, true) then
  return false
end
local generation = math.max(now, known + 1)
local since = math.floor(now / 1000)
redis.call('HSET', base .. 'link', 'replica', ARGV[1], 'generation', generation, 'since', since)
redis.call('PERSIST', base .. 'link')
local waiting = redis.call('ZRANGEBYSCORE', base .. 'wait', '(' .. string.format('%.0f', now), '+inf')
return { generation, since, before[1], before[2], before[3], waiting }
