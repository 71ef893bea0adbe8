-- behind, most. Gives each device and its link.
local devices = redis.call('ZRANGEBYLEX', base .. 'live', ARGV[1], '+', 'LIMIT', 0, ARGV[2])
local found = {}
for _, device in ipairs(devices) do
  local _, _, record = listed(device)
  found[#found + 1] = device
  found[#found + 1] = record or ''
end
return found
