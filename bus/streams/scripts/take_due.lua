-- take_due: take parked entries from lanes whose time has come.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  3 most entries to take  4.. lanes, oldest first
-- Returns {entries as {id, delivery count, fields}, lost ids}. Costs what is due, not what is
-- parked. Lanes found or left empty are deleted.
-- Atomic  because two sweepers must not take one entry.
-- include _owned
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local entries, lost, left = {}, {}, tonumber(ARGV[3])
for i = 4, #ARGV do
  if tonumber(string.sub(ARGV[i], 8)) <= now then
    if left > 0 then
      local rows = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', left, ARGV[i])
      local got, gone = take(KEYS[1], ARGV[1], ARGV[2], rows, 'count')
      for _, entry in ipairs(got) do entries[#entries + 1] = entry end
      for _, id in ipairs(gone) do lost[#lost + 1] = id end
      left = left - #got
    end
    drop_if_empty(KEYS[1], ARGV[1], ARGV[i])
  end
end
return {entries, lost}
