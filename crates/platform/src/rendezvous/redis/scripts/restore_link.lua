-- replica, generation, since. Gives 0 when there is a newer link.
local known = tonumber(redis.call('HGET', base .. 'link', 'generation')) or 0
if known > tonumber(ARGV[2]) then
  return 0
end
redis.call('HSET', base .. 'link', 'replica', ARGV[1], 'generation', ARGV[2], 'since', ARGV[3])
redis.call('PERSIST', base .. 'link')
return 1
