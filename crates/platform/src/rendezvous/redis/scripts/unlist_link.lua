-- device, generation, owner
local generation, owner = listed(ARGV[1])
if not generation or owner ~= ARGV[3] or tonumber(generation) > tonumber(ARGV[2]) then
  return 0
end
leave_owner(owner, ARGV[1])
redis.call('ZREM', base .. 'live', ARGV[1])
redis.call('HDEL', base .. 'links', ARGV[1])
return 1
