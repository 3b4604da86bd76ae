-- dead_letter: move deliveries that are still this worker's to the group's dead letters.
-- KEYS  1 stream or inbox  2 dead-letter stream  3 a lease, if nothing is done while there is one
-- ARGV  1 group  2 consumer  3 most dead letters to keep, 0 for no limit
--       then per entry: id, number of arguments, field, value, ...
-- Returns per entry 1, 0 if it was not this worker's, or 2 if the dead letters are full: nothing
--         was done then.
-- Atomic  because add-then-ack in two commands duplicates and ack-then-add loses. The body comes
--         from the worker's memory, so an entry that was trimmed meanwhile is still kept.
-- include _owned
local ids, starts, at = {}, {}, 4
while at <= #ARGV do
  ids[#ids + 1] = ARGV[at]
  starts[#starts + 1] = at + 1
  at = at + 2 + tonumber(ARGV[at + 1])
end
local most = tonumber(ARGV[3])
local room = most > 0 and most - redis.call('XLEN', KEYS[2]) or math.huge
local mine, answer = {}, {}
if not KEYS[3] or redis.call('EXISTS', KEYS[3]) == 0 then
  mine = owned(KEYS[1], ARGV[1], ARGV[2], ids)
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
for i, id in ipairs(ids) do
  answer[i] = 0
  if mine[id] and room < 1 then
    answer[i] = 2
  elseif mine[id] then
    local fields = {unpack(ARGV, starts[i] + 1, starts[i] + tonumber(ARGV[starts[i]]))}
    fields[#fields + 1] = 'deadtime'
    fields[#fields + 1] = now
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    finish(KEYS[1], ARGV[1], {id})
    room = room - 1
    answer[i] = 1
  end
end
return answer
