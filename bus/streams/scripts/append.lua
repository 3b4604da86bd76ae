-- append: add whole units of events to a stream, at most once per batch of a publisher.
-- KEYS  1 stream  2 the publisher's memory
-- ARGV  1 sequence of the batch  2 seconds to remember it  3 number of units
--       then per unit: number of events; per event: number of arguments, field, value, ...
-- Returns {id of the first event, events, units taken, 1 if this repeats a batch already appended}.
--         Event n (from 0) has the id `ms-(seq + n)` of the first.
-- Error   STALE: a later batch of this publisher was appended before.
-- Atomic  because a repeat must find either all of the batch or nothing of it.
local seq = tonumber(ARGV[1])
local memory = redis.call('GET', KEYS[2])
if memory then
  local last, first, events, units = string.match(memory, '^(%d+) (%S+) (%d+) (%d+)$')
  if seq == tonumber(last) then return {first, tonumber(events), tonumber(units), 1} end
  if seq < tonumber(last) then
    return redis.error_reply('STALE batch ' .. ARGV[1] .. ', the last one was ' .. last)
  end
end
local at, events, first, ms, low = 4, 0, nil, nil, nil
for _ = 1, tonumber(ARGV[3]) do
  local in_unit = tonumber(ARGV[at])
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
end
redis.call('SET', KEYS[2], table.concat({ARGV[1], first, events, ARGV[3]}, ' '), 'EX', ARGV[2])
return {first, events, tonumber(ARGV[3]), 0}
