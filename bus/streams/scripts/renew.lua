-- renew: say that this worker still works on what it holds.
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  3.. entry ids
-- Returns {ids that are not this worker's any more, ids whose entry is gone}.
-- Atomic  because XCLAIM cannot say "only if it is mine": a late renewal would steal back.
-- include _owned
local ids = {}
for i = 3, #ARGV do ids[#ids + 1] = ARGV[i] end
local mine, held, refused, lost = owned(KEYS[1], ARGV[1], ARGV[2], ids), {}, {}, {}
for _, id in ipairs(ids) do
  if mine[id] then held[#held + 1] = id else refused[#refused + 1] = id end
end
if #held > 0 then
  held[#held + 1] = 'JUSTID'
  local got = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(held))
  if #got < #held - 1 then
    local kept = {}
    for _, id in ipairs(got) do kept[id] = true end
    for i = 1, #held - 1 do
      if not kept[held[i]] then
        redis.call('XACK', KEYS[1], ARGV[1], held[i])
        lost[#lost + 1] = held[i]
      end
    end
  end
end
return {refused, lost}
