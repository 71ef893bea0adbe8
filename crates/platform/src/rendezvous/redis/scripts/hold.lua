-- stream, keep. A stream that is there counts, whatever the limit.
redis.call('ZADD', base .. 'streams', 'NX', clock(), ARGV[1])
redis.call('PEXPIRE', base .. 'streams', ARGV[2])
return 1
