-- role, lease. Gives 1 when all is settled, and the leases that are alive.
local now, lease = clock(), tonumber(ARGV[2])
local found = { is_settled(lease, now, 0) and 1 or 0 }
each_alive(ARGV[1], lease, now, function(_, value)
  found[#found + 1] = value
end)
return found
