-- When a missing lease proves nothing: while nobody has renewed for half a lease, and for two renewals after that.
local function is_continuous(lease, now)
  local renewed = redis.call('HGET', base .. 'state', 'renewed')
  return renewed and math.abs(now - renewed) <= lease / 2
end

-- To end what belongs to a missing process takes a whole lease more than to doubt it.
local function is_settled(lease, now, margin)
  local settling = tonumber(redis.call('HGET', base .. 'state', 'settling')) or 0
  return is_continuous(lease, now) and now >= settling + margin
end

local function parts(value)
  return string.match(value, '^(%d+) (.*)$')
end

-- Calls `found` with each lease that is alive, as incarnation, value and when it was renewed.
local function each_alive(role, lease, now, found)
  local leases = redis.call('HGETALL', base .. role)
  for index = 1, #leases, 2 do
    local renewed, value = parts(leases[index + 1])
    if now - renewed <= lease then
      found(leases[index], value, tonumber(renewed))
    elseif now - renewed > 10 * lease then
      redis.call('HDEL', base .. role, leases[index])
    end
  end
end
