-- replica, wait. Registers first and looks second.
local now, waiting = clock(), base .. 'wait'
redis.call('ZREMRANGEBYSCORE', waiting, '-inf', now)
redis.call('ZADD', waiting, 'GT', now + tonumber(ARGV[2]), ARGV[1])
local last = redis.call('ZRANGE', waiting, -1, -1, 'WITHSCORES')
redis.call('PEXPIREAT', waiting, last[2])
return link()
