-- replica. Gives generation and time, the link before, and who waits.
local now = clock()
local before = link()
local generation = math.max(now, (tonumber(before[2]) or 0) + 1)
local since = math.floor(now / 1000)
redis.call('HSET', base .. 'link', 'replica', ARGV[1], 'generation', generation, 'since', since)
redis.call('PERSIST', base .. 'link')
local waiting = redis.call('ZRANGEBYSCORE', base .. 'wait', '(' .. string.format('%.0f', now), '+inf')
return { generation, since, before[1], before[2], before[3], waiting }
