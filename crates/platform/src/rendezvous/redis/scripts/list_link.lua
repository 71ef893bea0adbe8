-- device, generation, owner, record. An older generation than the one that is listed changes nothing.
local generation, owner = listed(ARGV[1])
if generation and tonumber(generation) > tonumber(ARGV[2]) then
  return 0
end
if owner and owner ~= ARGV[3] then
  leave_owner(owner, ARGV[1])
end
redis.call('ZADD', base .. 'live', 0, ARGV[1])
redis.call('HSET', base .. 'links', ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
join_owner(ARGV[3], ARGV[1])
return 1
