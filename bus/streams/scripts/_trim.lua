-- Shared head of the scripts that make room in a stream; not a verb by itself.

-- include _ids

local function after(id)
  local ms, low = string.match(id, '^(%d+)-(%d+)$')
  low = tonumber(low)
  if low >= 9007199254740992 then return id end -- not countable: keeps one entry more
  return ms .. string.format('-%.0f', low + 1)
end

-- groups_of(stream) -> rows {name, pending, last delivered id, lag or nil}.
local function groups_of(stream)
  local rows = {}
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local row = {}
    for i = 1, #flat, 2 do row[flat[i]] = flat[i + 1] end
    rows[#rows + 1] = {row['name'], row['pending'], row['last-delivered-id'], row['lag']}
  end
  return rows
end

-- floor_of(stream) -> the smallest id that some group still needs, that group's row (both nil when
-- there is no group), and the ghosts met: {group, id, ...}. A ghost is a pending id whose entry is
-- gone; it is acked, so that it pins nothing (at most 100 per call).
local function floor_of(stream)
  local floor, who, lost = nil, nil, {}
  for _, row in ipairs(groups_of(stream)) do
    local needed = after(row[3])
    local pending = row[2]
    while pending > 0 do
      local oldest = redis.call('XPENDING', stream, row[1], '-', '+', 1)[1]
      if not oldest then break end
      local id = oldest[1]
      if #lost >= 200 or (floor and not before(id, floor))
        or #redis.call('XRANGE', stream, id, id) > 0 then
        if before(id, needed) then needed = id end
        break
      end
      redis.call('XACK', stream, row[1], id)
      lost[#lost + 1] = row[1]
      lost[#lost + 1] = id
      pending = pending - 1
    end
    row[2] = pending
    if not floor or before(needed, floor) then floor, who = needed, row end
  end
  return floor, who, lost
end

-- trim(stream, keep, length, least, singly) -> new length, the pinning group's row, ghosts, floor.
-- Removes what no group needs, oldest first, never below `keep` and at most 5,000 entries: whole
-- nodes, and only if that is less than `least` entries, single ones, at most `singly`: their bodies
-- pass through here, and the server does nothing else meanwhile.
local function trim(stream, keep, length, least, singly)
  local floor, who, lost = floor_of(stream)
  local spare = math.min(length - keep, 5000)
  if spare <= 0 then return length, who, lost, floor end
  local gone
  if floor then
    -- A trim that trims nothing is a write all the same: after it a script may pass maxmemory.
    local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if not oldest or not before(oldest[1], floor) then return length, who, lost, floor end
    gone = redis.call('XTRIM', stream, 'MINID', '~', floor, 'LIMIT', spare)
  else
    gone = redis.call('XTRIM', stream, 'MAXLEN', '~', keep, 'LIMIT', spare)
  end
  length = length - gone
  local wanted = math.min(least - gone, length - keep, singly)
  if wanted > 0 then
    -- MAXLEN counts and knows no floor, MINID the reverse: count what lies below the floor first.
    local single, from = wanted, '-'
    if floor then
      single = 0
      while single < wanted do
        local page = redis.call('XRANGE', stream, from, '(' .. floor, 'COUNT',
          math.min(32, wanted - single))
        single = single + #page
        if #page == 0 then break end
        from = '(' .. page[#page][1]
      end
    end
    if single > 0 then
      length = length - redis.call('XTRIM', stream, 'MAXLEN', length - single)
    end
  end
  return length, who, lost, floor
end

-- Who pins the stream, for an error's text: {group, floor, pending, lag or -1}; {} if nobody does.
local function pinned_by(who, floor)
  if not who then return {} end
  return {who[1], floor, who[2], who[4] or -1}
end

-- drop_oldest(stream, keep, length, count) -> new length, {group, entries it had not handled, ...}.
-- Removes the `count` oldest entries, at most 5,000, needed or not, but leaves `keep`; acks what was
-- pending.
local function drop_oldest(stream, keep, length, count)
  count = math.min(count, length - keep, 5000)
  if count <= 0 then return length, {} end
  local ids = {}
  local from = '-'
  while #ids < count do
    local page = redis.call('XRANGE', stream, from, '+', 'COUNT', math.min(32, count - #ids))
    if #page == 0 then break end
    for _, entry in ipairs(page) do ids[#ids + 1] = entry[1] end
    from = '(' .. ids[#ids]
  end
  local last, dropped = ids[#ids], {}
  for _, row in ipairs(groups_of(stream)) do
    local n = 0
    for i = #ids, 1, -1 do
      if not before(row[3], ids[i]) then break end
      n = n + 1 -- not delivered yet
    end
    while row[2] > 0 do
      local pending = redis.call('XPENDING', stream, row[1], '-', last, 500)
      for _, p in ipairs(pending) do redis.call('XACK', stream, row[1], p[1]) end
      n = n + #pending
      if #pending < 500 then break end
    end
    -- What is gone is behind it. Saying so voids the server's count of what the group has read,
    -- which 7.0 would have wrong for ever.
    if before(row[3], last) then redis.call('XGROUP', 'SETID', stream, row[1], last) end
    if n > 0 then
      dropped[#dropped + 1] = row[1]
      dropped[#dropped + 1] = n
    end
  end
  return length - redis.call('XTRIM', stream, 'MAXLEN', length - #ids), dropped
end
