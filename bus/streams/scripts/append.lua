-- append: add whole units of events to a stream, as many as fit, at most once per batch.
-- KEYS  1 stream  2 the publisher's memory  3 counts of what was dropped unhandled, by group
-- ARGV  1 sequence of the batch  2 seconds to remember it  3 keep  4 slack  5 most entries
--       6 1 to drop the oldest entries when it is full  7 number of units  8 number of events
--       then per unit: number of events; per event: number of arguments, field, value, ...
-- Returns {id of the first event, events, units taken, 1 if this repeats a batch already appended,
--         room left}, and after a look for room {..., who pins it, lost, dropped}. Event n (from 0)
--         has the id `ms-(seq + n)` of the first. With no unit taken the id is '' and nothing is
--         remembered. room is -1 in a repeat. who pins it: {group, floor, pending, lag}, only if a
--         unit was left. lost: ghosts, {group, id, ...}. dropped: {group, entries it had not
--         handled, ...}.
-- Error   STALE: a later batch of this publisher was appended before.
-- Atomic  because a repeat must find either all of what was taken or nothing of it, and because
--         what is trimmed must still be needed by nobody when it goes.
local seq = tonumber(ARGV[1])
local memory = redis.call('GET', KEYS[2])
if memory then
  local last, first, events, units = string.match(memory, '^(%d+) (%S+) (%d+) (%d+)$')
  if seq == tonumber(last) then
    return {first, tonumber(events), tonumber(units), 1, -1}
  end
  if seq < tonumber(last) then
    return redis.error_reply('STALE batch ' .. ARGV[1] .. ', the last one was ' .. last)
  end
end
local keep, slack, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local units, total = tonumber(ARGV[7]), tonumber(ARGV[8])
local stream, overrun, drop, length, found = KEYS[1], KEYS[3], ARGV[6], nil, nil
-- include _look
local at, events, taken, first, ms, low = 9, 0, 0, nil, nil, nil
while taken < units do
  local in_unit = tonumber(ARGV[at])
  if length + in_unit > most then break end
  at = at + 1
  for _ = 1, in_unit do
    local n = tonumber(ARGV[at])
    if first then
      -- With '*' throughout, ids are not contiguous on 6.2 and 7.0: the clock may tick inside.
      redis.call('XADD', KEYS[1], ms .. string.format('-%.0f', low + events),
        unpack(ARGV, at + 1, at + n))
    else
      first = redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, at + n))
      ms, low = string.match(first, '^(%d+)-(%d+)$')
      low = tonumber(low)
      if low > 4503599627370496 then
        redis.call('XDEL', KEYS[1], first)
        return redis.error_reply('ERR the last id of the stream leaves no room to count on')
      end
    end
    events = events + 1
    at = at + n + 1
  end
  length = length + in_unit
  taken = taken + 1
end
if taken > 0 then
  redis.call('SET', KEYS[2], table.concat({ARGV[1], first, events, taken}, ' '), 'EX', ARGV[2])
end
local answer = {first or '', events, taken, 0, most - length}
if found then
  answer[6], answer[7], answer[8] = taken < units and found[1] or {}, found[2], found[3]
end
return answer
