-- ack: finish deliveries that are still this worker's.
-- KEYS  1 stream or inbox
-- ARGV  1 group  2 consumer  3.. entry ids
-- Returns the ids that were not this worker's any more; nothing was done to them.
-- Atomic  because XACK alone asks nobody: a worker that lost an entry would finish it twice.
-- include _owned
local ids = {}
for i = 3, #ARGV do ids[#ids + 1] = ARGV[i] end
local mine, done, refused = owned(KEYS[1], ARGV[1], ARGV[2], ids), {}, {}
for _, id in ipairs(ids) do
  if mine[id] then done[#done + 1] = id else refused[#refused + 1] = id end
end
if #done > 0 then finish(KEYS[1], ARGV[1], done) end
return refused
