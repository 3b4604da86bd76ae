-- move_parked: move a group's oldest parked entries into its inbox, so that they pin nothing.
-- KEYS  1 stream  2 the group's inbox
-- ARGV  1 group  2 most entries to move  3 most entries of the inbox  4 most bytes to move, about
-- Returns {moved, lost ids, 1 if the inbox is full}. Only what stands first in the pending list and is in a lane: behind an
-- entry that runs, moving others would free nothing.
-- Atomic  because the lane owns an entry until it is in the inbox: nobody may take it in between.
-- include _owned
local moved, lost, lanes, bytes = 0, {}, {}, tonumber(ARGV[4])
local room = tonumber(ARGV[3]) - redis.call('XLEN', KEYS[2])
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[2])) do
  local id, lane, count = row[1], row[2], row[4]
  local due = string.match(lane, '^parked:(%d+)$')
  if not due or moved >= room or bytes <= 0 then break end
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    local fields = entry[2]
    if #fields > 7000 then break end -- more than a script can pass on; only others write such
    for _, word in ipairs(fields) do bytes = bytes - #word end
    for _, word in ipairs({'origentry', id, 'attempts', count, 'due', due}) do
      fields[#fields + 1] = word
    end
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    moved = moved + 1
  else
    lost[#lost + 1] = id
  end
  redis.call('XACK', KEYS[1], ARGV[1], id)
  lanes[lane] = true
end
for lane, _ in pairs(lanes) do drop_if_empty(KEYS[1], ARGV[1], lane) end
if moved > 0 then redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0') end -- it may exist
return {moved, lost, moved >= room and 1 or 0}
