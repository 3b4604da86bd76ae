-- dead_letter: move deliveries that are still this worker's to the group's dead letters.
-- KEYS  1 stream  2 dead-letter stream
-- ARGV  1 group  2 consumer  then per entry: id, number of arguments, field, value, ...
-- Returns per entry 1, or 0 if it was not this worker's.
-- Atomic  because add-then-ack in two commands duplicates and ack-then-add loses. The body comes
--         from the worker's memory, so an entry that was trimmed meanwhile is still kept.
local ids, starts, at = {}, {}, 3
while at <= #ARGV do
  ids[#ids + 1] = ARGV[at]
  starts[#starts + 1] = at + 1
  at = at + 2 + tonumber(ARGV[at + 1])
end
local mine, answer = owned(KEYS[1], ARGV[1], ARGV[2], ids), {}
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
for i, id in ipairs(ids) do
  answer[i] = 0
  if mine[id] then
    local fields = {unpack(ARGV, starts[i] + 1, starts[i] + tonumber(ARGV[starts[i]]))}
    fields[#fields + 1] = 'deadtime'
    fields[#fields + 1] = now
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    redis.call('XACK', KEYS[1], ARGV[1], id)
    answer[i] = 1
  end
end
return answer
