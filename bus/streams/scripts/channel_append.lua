-- channel_append: add events to a channel, at most once per batch, and put off its expiry.
-- KEYS  1 the channel  2 one beside it that never exists
-- ARGV  1 ms until it expires  2 most entries  3 type of the end marker
--       4 how many ms back to look for the batch, which may be in already; 0 if it was never sent
--       5 number of events
--       then per event: 1, number of arguments, field, value, ...; id, type and data come first
-- Returns {id of the first event, events, events, 1 if the batch was in already, most entries}.
--         Event n (from 0) has the id `ms-(seq + n)` of the first. What follows an end marker in
--         the batch is not taken, and does not count.
--         An end marker behind an end marker is in already.
-- Error   ENDED: the newest entry is an end marker.
-- Atomic  because nothing may come behind an end marker, and because a repeat that finds the last
--         event of its batch knows by that where the others are.
local ends, total = ARGV[3], tonumber(ARGV[5])
local at, taken, last_event = 6, 0, nil
while taken < total do
  taken, last_event = taken + 1, ARGV[at + 3]
  if ARGV[at + 5] == ends then break end
  at = at + 2 + tonumber(ARGV[at + 1])
end
if ARGV[4] ~= '0' then
  local now = redis.call('TIME')
  local since = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[4])
  -- The newest first: it is near the end, unless others have added much meanwhile.
  local before = '+'
  while before do
    local page = redis.call('XREVRANGE', KEYS[1], before, since, 'COUNT', 100)
    for _, entry in ipairs(page) do
      if entry[2][1] == 'id' and entry[2][2] == last_event then
        local prefix, low = string.match(entry[1], '^(%d+%-)(%d+)$')
        return {prefix .. string.format('%.0f', tonumber(low) - taken + 1), taken, taken, 1,
          tonumber(ARGV[2])}
      end
    end
    before = page[100] and '(' .. page[100][1]
  end
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if newest and newest[2][4] == ends and newest[2][3] == 'type' then
  if ARGV[11] == ends then return {newest[1], 1, 1, 1, tonumber(ARGV[2])} end
  return redis.error_reply('ENDED nothing can be added to it any more')
end
if newest and tonumber(string.match(newest[1], '%d+$')) > 4503599627370496 then
  return redis.error_reply('ERR the last id of the channel leaves no room to count on')
end
-- The server asks whether there is memory only as long as a script has called nothing that writes,
-- and not before PEXPIRE. This adds nothing, and is refused when it is full.
redis.call('XADD', KEYS[2], 'NOMKSTREAM', 'MAXLEN', 0, '*', 'probe', 1)
-- Before the entries, so that who may not do it has added nothing.
local there = redis.call('PEXPIRE', KEYS[1], ARGV[1])
local first, prefix, low
at = 6
for n = 0, taken - 1 do
  -- With '*' throughout, ids are not contiguous on 6.2 and 7.0: the clock may tick inside.
  local id = low and prefix .. string.format('%.0f', low + n) or '*'
  local count = tonumber(ARGV[at + 1])
  if n < taken - 1 then
    id = redis.call('XADD', KEYS[1], id, unpack(ARGV, at + 2, at + 1 + count))
  else
    id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], id,
      unpack(ARGV, at + 2, at + 1 + count))
  end
  at = at + 2 + count
  if not low then
    first = id
    prefix, low = string.match(first, '^(%d+%-)(%d+)$')
    low = tonumber(low)
  end
end
if there == 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return {first, taken, taken, 0, tonumber(ARGV[2])}
