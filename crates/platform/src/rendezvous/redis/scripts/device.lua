-- A device's link: the highest generation, and replica and time while it is up.
local function link()
  local known = redis.call('HMGET', base .. 'link', 'replica', 'generation', 'since')
  return { known[1], known[2], known[3] }
end
