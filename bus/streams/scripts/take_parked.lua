-- take_parked: take single parked entries whose exact time has come, before their whole lane is due.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  then per entry: lane, id
-- Returns {entries as {id, delivery count, fields}, lost ids}; one that left its lane is not among
-- them. Lanes left empty are deleted.
-- Atomic  because a sweeper may be taking the same entry.
-- include _owned
local rows, lanes = {}, {}
for i = 3, #ARGV, 2 do
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i + 1], ARGV[i + 1], 1, ARGV[i])[1]
  if row then rows[#rows + 1] = row end
  lanes[ARGV[i]] = true
end
local entries, lost = take(KEYS[1], ARGV[1], ARGV[2], rows, 'count')
for lane, _ in pairs(lanes) do drop_if_empty(KEYS[1], ARGV[1], lane) end
return {entries, lost}
