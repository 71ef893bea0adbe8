-- stream. Gives record and state when it is known.
local known = redis.call('HMGET', key_of(ARGV[1]), 'record', 'state')
if known[1] then
  return known
end
return {}
