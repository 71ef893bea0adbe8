-- holder, limit, unused, change, want, keep. Tells what became of this holder's slots, and gives how many more it gets;
-- -1 when the number of streams is not known.
local slots, now = base .. 'slots', clock()
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', base .. 'holders', '-inf', now)) do
  redis.call('HDEL', slots, holder)
  redis.call('ZREM', base .. 'holders', holder)
end
local live = tonumber(redis.call('HGET', slots, 'live'))
if not live then
  return -1
end
live = math.max(0, live + tonumber(ARGV[4]))
redis.call('HSET', slots, 'live', live)
local holder, unused = 'holder:' .. ARGV[1], tonumber(ARGV[3])
redis.call('HSET', slots, holder, unused)
local taken, fields = live, redis.call('HGETALL', slots)
for index = 1, #fields, 2 do
  if fields[index] ~= 'live' then
    taken = taken + tonumber(fields[index + 1])
  end
end
local granted = math.max(0, math.min(tonumber(ARGV[5]) - unused, tonumber(ARGV[2]) - taken))
if unused + granted == 0 then
  redis.call('HDEL', slots, holder)
  redis.call('ZREM', base .. 'holders', holder)
else
  redis.call('HSET', slots, holder, unused + granted)
  redis.call('ZADD', base .. 'holders', now + tonumber(ARGV[6]), holder)
end
return granted
