-- generation, keep. The generation stays, so that the next one is higher.
if redis.call('HGET', base .. 'link', 'generation') == ARGV[1] then
  redis.call('HDEL', base .. 'link', 'replica', 'since')
  redis.call('PEXPIRE', base .. 'link', ARGV[2])
end
return 1
