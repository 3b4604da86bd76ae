-- append: add whole units of events to a stream, as many as fit, at most once per batch.
-- KEYS  1 stream  2 the publisher's memory  3 counts of what was dropped unhandled, by group
-- ARGV  1 sequence of the batch  2 seconds to remember it  3 keep  4 slack  5 most entries
--       6 1 to drop the oldest entries when it is full  7 number of units  8 number of events
--       9 1 if the batch counts only behind the one before it, taken whole; 2 if it may have been
--         sent before: it is remembered even if nothing of it fits, so that what was sent before
--         is not taken later, when its publisher was told that it was not
--       then per unit: number of events; per event: number of arguments, field, value, ...
--       or, of events with no more than id, type, data, and a key: '=' and type, id, data, or '+'
--       and type, id, data, key, of one event; '*' and their number, their type, and id, data of
--       each, or '#' and their number, their type, and id, data, key of each
-- Returns {id of the first event, events, units taken, 1 if this repeats a batch already appended,
--         room left}, and after a look for room {..., who pins it, lost, dropped}. Event n (from 0)
--         has the id `ms-(seq + n)` of the first. With no unit taken the id is ''. room is -1 in a repeat. who pins it: {group, floor, pending, lag}, only if a
--         unit was left. lost: ghosts, {group, id, ...}. dropped: {group, entries it had not
--         handled, ...}. {'', 0, 0, 2, -1} if what it was to follow is not in, or not whole.
-- Error   STALE: a later batch of this publisher was appended before, and it is not the last but
--         one.
-- Memory  of the last two batches, the last one first: sequence, 1 if all of it was taken, id of
--         its first event, events, units; a comma between them.
-- Atomic  because a repeat must find either all of what was taken or nothing of it, and because
--         what is trimmed must still be needed by nobody when it goes.
local seq = tonumber(ARGV[1])
local memory = redis.call('GET', KEYS[2])
local last, whole
if memory then
  last, whole = string.match(memory, '^(%d+) (%d)')
  last = tonumber(last)
  if seq <= last then
    for said in string.gmatch(memory, '[^,]+') do
      local number, first, events, units = string.match(said, '^(%d+) %d (%S+) (%d+) (%d+)$')
      if tonumber(number) == seq then
        return {first == '-' and '' or first, tonumber(events), tonumber(units), 1, -1}
      end
    end
    return redis.error_reply('STALE batch ' .. ARGV[1] .. ', the last one was ' .. last)
  end
end
if ARGV[9] == '1' and (last ~= seq - 1 or whole ~= '1') then return {'', 0, 0, 2, -1} end
local keep, slack, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local units, total = tonumber(ARGV[7]), tonumber(ARGV[8])
local stream, overrun, drop, length, found = KEYS[1], KEYS[3], ARGV[6], nil, nil
-- include _look
local at, events, taken, first, low, prefix = 10, 0, 0, nil, nil, nil
while taken < units do
  local form = ARGV[at]
  local one = form == '=' or form == '+'
  local many = form == '*' or form == '#'
  local in_unit = one and 1 or tonumber(many and ARGV[at + 1] or form)
  if length + in_unit > most then break end
  local keyed, kind = form == '+' or form == '#', nil
  if one then
    kind, at = ARGV[at + 1], at + 2
  elseif many then
    kind, at = ARGV[at + 2], at + 3
  else
    at = at + 1
  end
  for _ = 1, in_unit do
    -- With '*' throughout, ids are not contiguous on 6.2 and 7.0: the clock may tick inside.
    local id = '*'
    if low then
      id = low + events -- a number of less than 15 digits becomes text as it is
      id = prefix .. (id < 1e14 and id or string.format('%.0f', id))
    end
    if keyed then
      id = redis.call('XADD', KEYS[1], id, 'id', ARGV[at], 'type', kind, 'data', ARGV[at + 1],
        'partitionkey', ARGV[at + 2])
      at = at + 3
    elseif kind then
      id = redis.call('XADD', KEYS[1], id, 'id', ARGV[at], 'type', kind, 'data', ARGV[at + 1])
      at = at + 2
    else
      local n = tonumber(ARGV[at])
      id = redis.call('XADD', KEYS[1], id, unpack(ARGV, at + 1, at + n))
      at = at + n + 1
    end
    if not low then
      first = id
      prefix, low = string.match(first, '^(%d+%-)(%d+)$')
      low = tonumber(low)
      if low > 4503599627370496 then
        redis.call('XDEL', KEYS[1], first)
        return redis.error_reply('ERR the last id of the stream leaves no room to count on')
      end
    end
    events = events + 1
  end
  length = length + in_unit
  taken = taken + 1
end
if taken > 0 or ARGV[9] == '2' then
  local said = ARGV[1] .. (taken == units and ' 1 ' or ' 0 ') .. (first or '-')
    .. ' ' .. events .. ' ' .. taken
  if memory then said = said .. ',' .. string.match(memory, '^[^,]+') end
  redis.call('SET', KEYS[2], said, 'EX', ARGV[2])
end
local answer = {first or '', events, taken, 0, most - length}
if found then
  answer[6], answer[7], answer[8] = taken < units and found[1] or {}, found[2], found[3]
end
return answer
