-- Who in a bucket belongs to which process: a set for each incarnation, and how many there are in each.
local function join_owner(owner, member)
  if redis.call('SADD', base .. 'of:' .. owner, member) == 1 then
    redis.call('HINCRBY', base .. 'owners', owner, 1)
  end
end

local function leave_owner(owner, member)
  if redis.call('SREM', base .. 'of:' .. owner, member) == 1 then
    if redis.call('HINCRBY', base .. 'owners', owner, -1) <= 0 then
      redis.call('HDEL', base .. 'owners', owner)
    end
  end
end

-- Calls `found` with up to `most` members of processes that are not among the `alive`.
local function each_lost(alive, most, found)
  local is_alive = {}
  for _, owner in ipairs(alive) do
    is_alive[owner] = true
  end
  for _, owner in ipairs(redis.call('HKEYS', base .. 'owners')) do
    if not is_alive[owner] then
      local members = redis.call('SRANDMEMBER', base .. 'of:' .. owner, most)
      for _, member in ipairs(members) do
        found(owner, member)
      end
      if #members == 0 then
        redis.call('HDEL', base .. 'owners', owner)
      end
    end
  end
end
