-- lease, period. One process sweeps in each period: gives nothing to the others, and to it whether all is settled, and the
-- incarnations that are alive.
if not redis.call('SET', base .. 'sweep', 1, 'NX', 'PX', ARGV[2]) then
  return false
end
local now, lease = clock(), tonumber(ARGV[1])
local found = { is_settled(lease, now, lease) and '1' or '0' }
for _, role in ipairs({ 'control', 'edge' }) do
  each_alive(role, lease, now, function(incarnation)
    found[#found + 1] = incarnation
  end)
end
return found
