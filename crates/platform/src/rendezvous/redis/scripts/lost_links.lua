-- most, alive... Gives device, generation and owner of links whose replicas are gone.
local found = {}
each_lost({ unpack(ARGV, 2) }, ARGV[1], function(owner, device)
  local generation = listed(device)
  if generation then
    found[#found + 1] = device
    found[#found + 1] = generation
    found[#found + 1] = owner
  else
    leave_owner(owner, device)
  end
end)
return found
