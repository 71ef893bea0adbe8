-- generation, incarnation, keep. The generation stays, so that the next one is higher.
local known = redis.call('HMGET', base .. 'link', 'replica', 'generation')
if known[1] and tonumber(known[2]) <= tonumber(ARGV[1]) and string.find(known[1], ARGV[2], 1, true) then
  redis.call('HDEL', base .. 'link', 'replica', 'since')
  redis.call('PEXPIRE', base .. 'link', ARGV[3])
end
return 1
