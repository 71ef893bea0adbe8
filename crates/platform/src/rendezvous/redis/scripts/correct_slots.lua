-- live, exact or raise
local known = tonumber(redis.call('HGET', base .. 'slots', 'live'))
if ARGV[2] == 'exact' or not known or known < tonumber(ARGV[1]) then
  redis.call('HSET', base .. 'slots', 'live', ARGV[1])
end
return 1
