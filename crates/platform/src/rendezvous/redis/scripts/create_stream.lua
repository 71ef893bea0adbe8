-- stream, record, state, owner, service, due, abandoned
if redis.call('EXISTS', key_of(ARGV[1])) == 0 then
  insert(ARGV[1], 0, ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7])
end
return 1
