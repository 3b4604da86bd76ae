-- Shared head of the scripts that end or move a delivery; not a verb by itself.

-- owned(stream, group, owner, ids) -> table id -> delivery count, of those `ids` that are pending
-- and whose owner is `owner`. XPENDING pages of #ids rows (0.9-1.4 us per row), from the first id
-- on, since ids come nearly in order; only when some are missing, what lies before it, too.
local function owned(stream, group, owner, ids)
  local wanted, found, left = {}, {}, 0
  for _, id in ipairs(ids) do
    if not wanted[id] then
      wanted[id] = true
      left = left + 1
    end
  end
  local page = math.max(left, 16)
  local function scan(from, to)
    while left > 0 do
      local rows = redis.call('XPENDING', stream, group, from, to, page, owner)
      for _, row in ipairs(rows) do
        if wanted[row[1]] then
          found[row[1]] = row[4]
          left = left - 1
        end
      end
      if #rows < page then break end
      from = '(' .. rows[#rows][1]
    end
  end
  scan(ids[1], '+')
  scan('-', '(' .. ids[1])
  return found
end

-- take(stream, group, owner, rows, mode) -> entries {id, count, fields}, lost ids.
-- Moves the pending `rows` (as XPENDING gives them) to `owner` with their bodies. mode 'count'
-- raises the delivery count, 'keep' leaves it. A row whose entry is gone is acked and counted as
-- lost: 6.2 answers nil for it and keeps it pending for ever, 7.0 and later drop it silently.
local function take(stream, group, owner, rows, mode)
  local entries, lost = {}, {}
  for _, row in ipairs(rows) do
    local id, count = row[1], row[4]
    if mode == 'count' then count = count + 1 end
    local got = redis.call('XCLAIM', stream, group, owner, 0, id, 'RETRYCOUNT', count)
    if got[1] and got[1][2] then
      entries[#entries + 1] = {id, count, got[1][2]}
    else
      redis.call('XACK', stream, group, id)
      lost[#lost + 1] = id
    end
  end
  return entries, lost
end

-- finish(stream, group, ids): ack them. Those of an inbox are deleted: no other group reads it.
-- Only the key of a partition's own stream ends with '}'.
local function finish(stream, group, ids)
  redis.call('XACK', stream, group, unpack(ids))
  if string.sub(stream, -1) ~= '}' then redis.call('XDEL', stream, unpack(ids)) end
end

-- A lane is a consumer only while it owns something.
local function drop_if_empty(stream, group, lane)
  if #redis.call('XPENDING', stream, group, '-', '+', 1, lane) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, lane)
  end
end
