-- role, lease. Gives 1 when all is settled, and the leases that are alive, the one that was renewed last at the end.
local now, lease = clock(), tonumber(ARGV[2])
local alive = {}
each_alive(ARGV[1], lease, now, function(_, value, renewed)
  alive[#alive + 1] = { value = value, renewed = renewed }
end)
table.sort(alive, function(a, b)
  return a.renewed < b.renewed
end)
local found = { is_settled(lease, now, 0) and 1 or 0 }
for _, one in ipairs(alive) do
  found[#found + 1] = one.value
end
return found
