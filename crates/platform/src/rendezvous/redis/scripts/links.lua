-- A listed link is its generation, its replica's incarnation and its record, in one value.
local function listed(device)
  local value = redis.call('HGET', base .. 'links', device)
  if not value then
    return nil
  end
  return string.match(value, '^(%d+) (%x+) (.*)$')
end
