-- once: say whether an event may be handled, or another delivery of it was, or is being handled.
-- KEYS  1 the event's mark  2 stream  3 the group's inbox
-- ARGV  1 group  2 's' or 'i': where the delivery lies  3 its entry id  4 ms the mark is kept
-- Returns 1 this delivery may: the mark names it now. 0 handled before. 2 another one is pending
--         that may.
-- Atomic  because two deliveries of one event may ask at the same time.
-- The mark is 'done' (put by the script that acks), or names who may. One that is pending no more
-- and has not put 'done' has died: dead letter, deleted, its group made anew. Another may then.
local me = ARGV[2] .. ' ' .. ARGV[3]
local mark = redis.call('GET', KEYS[1])
if mark == 'done' then return 0 end
if mark and mark ~= me then
  local place, id = string.match(mark, '^(%a) (%S+)$')
  local pending
  if place == 'i' then
    pending = redis.pcall('XPENDING', KEYS[3], ARGV[1], id, id, 1)
  else
    pending = redis.pcall('XPENDING', KEYS[2], ARGV[1], id or '-', id or '-', 1)
  end
  if #pending > 0 then return 2 end
end
redis.call('SET', KEYS[1], me, 'PX', ARGV[4])
return 1
