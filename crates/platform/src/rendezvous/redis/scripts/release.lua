-- streams
return redis.call('ZREM', base .. 'streams', unpack(ARGV))
