-- Gives how many live streams of this bucket each service has.
return redis.call('HGETALL', base .. 'services')
