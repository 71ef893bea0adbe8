-- stream, rank, state, remember, record, owner, service, due, abandoned. Gives 1 when the stream is live.
local stream, rank, key = ARGV[1], tonumber(ARGV[2]), key_of(ARGV[1])
if rank ~= ENDED and redis.call('HGET', key, 'lost') then
  redis.call('DEL', key)
end
local known = redis.call('HGET', key, 'rank')
if not known and rank ~= ENDED then
  insert(stream, rank, ARGV[5], ARGV[3], ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9])
  return 1
end
advance(stream, rank, ARGV[3], ARGV[4], false)
return redis.call('ZSCORE', base .. 'live', stream) and 1 or 0
