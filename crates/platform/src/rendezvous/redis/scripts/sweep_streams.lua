-- missing, lost, remember, most, settled, alive... Gives the first records of the streams that it ends: first those whose
-- legs are missing, then those whose edges are lost, and how many the former are.
local remember, most = ARGV[3], tonumber(ARGV[4])
local ended, missing = { 0 }, 0
-- Who has joined or holds what is missing may only not have come round yet.
if ARGV[5] ~= '1' then
  return ended
end
for _, stream in ipairs(redis.call('ZRANGEBYSCORE', base .. 'due', '-inf', clock(), 'LIMIT', 0, most)) do
  local record = advance(stream, ENDED, ARGV[1], remember, false)
  if record then
    ended[#ended + 1] = record
  end
  -- Also where its record has gone.
  redis.call('ZREM', base .. 'due', stream)
  redis.call('ZREM', base .. 'live', stream)
end
ended[1] = #ended - 1
each_lost({ unpack(ARGV, 6) }, most, function(owner, stream)
  local record = advance(stream, ENDED, ARGV[2], remember, true)
  if record then
    ended[#ended + 1] = record
  end
  redis.call('ZREM', base .. 'live', stream)
  leave_owner(owner, stream)
end)
return ended
