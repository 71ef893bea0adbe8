-- role, incarnation
return redis.call('HDEL', base .. ARGV[1], ARGV[2])
