-- live
redis.call('HSET', base .. 'slots', 'live', ARGV[1])
return 1
