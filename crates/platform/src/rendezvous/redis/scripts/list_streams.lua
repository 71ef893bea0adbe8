-- behind, most. Gives the last stream that was looked at, how many were, and record and state of each.
local streams = redis.call('ZRANGEBYLEX', base .. 'live', ARGV[1], '+', 'LIMIT', 0, ARGV[2])
local found = { streams[#streams] or '', #streams }
for _, stream in ipairs(streams) do
  local known = redis.call('HMGET', key_of(stream), 'record', 'state')
  if known[1] then
    found[#found + 1] = known[1]
    found[#found + 1] = known[2]
  end
end
return found
