-- Gives a number that changes when the records of this bucket were lost.
redis.call('SET', base .. 'mark', string.format('%.0f', clock()), 'NX')
return tonumber(redis.call('GET', base .. 'mark'))
