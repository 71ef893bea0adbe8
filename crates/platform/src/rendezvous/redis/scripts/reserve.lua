-- stream, limit, keep. Gives 1 and the device's link, or 0 and some of the streams that fill the limit, each with its age.
local streams = base .. 'streams'
local now = clock()
if not redis.call('ZSCORE', streams, ARGV[1]) then
  if redis.call('ZCARD', streams) >= tonumber(ARGV[2]) then
    local held = { 0 }
    for index, value in ipairs(redis.call('ZRANDMEMBER', streams, 16, 'WITHSCORES')) do
      held[#held + 1] = index % 2 == 1 and value or tostring(now - tonumber(value))
    end
    return held
  end
  redis.call('ZADD', streams, now, ARGV[1])
  redis.call('PEXPIRE', streams, ARGV[3])
end
local found = link()
return { 1, found[1], found[2], found[3] }
