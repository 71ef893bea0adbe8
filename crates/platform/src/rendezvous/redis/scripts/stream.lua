-- One stream: a hash with its first record and its state, which stands in the indices of its bucket until it is over.
local JOINED, ENDED = 2, 3

local function key_of(stream)
  return base .. 'stream:' .. stream
end

local function insert(stream, rank, record, state, owner, service, due, abandoned)
  local key = key_of(stream)
  redis.call('HSET', key, 'rank', rank, 'record', record, 'state', state, 'owner', owner, 'service', service)
  redis.call('ZADD', base .. 'live', 0, stream)
  join_owner(owner, stream)
  redis.call('HINCRBY', base .. 'services', service, 1)
  if rank < JOINED then
    redis.call('ZADD', base .. 'due', clock() + due, stream)
    redis.call('PEXPIRE', key, abandoned)
  end
end

-- Gives the first record when that changed the stream.
local function advance(stream, rank, state, remember, lost)
  local key = key_of(stream)
  local known = redis.call('HMGET', key, 'rank', 'record', 'owner', 'service', 'lost')
  if not known[1] then
    if rank == ENDED then
      -- Remembered, so that nobody announces it again afterwards.
      redis.call('HSET', key, 'rank', rank)
      redis.call('PEXPIRE', key, remember)
    end
    return false
  end
  if known[5] and rank == ENDED and not lost then
    -- That its edge was lost was only assumed. All else is done.
    redis.call('HSET', key, 'state', state)
    redis.call('HDEL', key, 'lost')
    return false
  end
  if tonumber(known[1]) >= rank then
    return false
  end
  redis.call('HSET', key, 'rank', rank, 'state', state)
  if rank >= JOINED then
    redis.call('ZREM', base .. 'due', stream)
    redis.call('PERSIST', key)
  end
  if rank == ENDED then
    redis.call('ZREM', base .. 'live', stream)
    leave_owner(known[3], stream)
    if redis.call('HINCRBY', base .. 'services', known[4], -1) <= 0 then
      redis.call('HDEL', base .. 'services', known[4])
    end
    if lost then
      redis.call('HSET', key, 'lost', 1)
    end
    redis.call('PEXPIRE', key, remember)
  end
  return known[2]
end
