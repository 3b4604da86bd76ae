-- recover: hand this worker what was delivered to it but never reached it (a reply was lost).
-- KEYS  1 stream
-- ARGV  1 group  2 consumer  3 most entries to return  4.. ids it holds already
-- Returns {entries as {id, delivery count, fields}, lost ids}; call again while entries come.
-- The count stays: re-reading by `XREADGROUP 0` would raise it on this server but not in its AOF.
-- Atomic  because each row must still be this worker's when it is handed out.
-- include _owned
local held, rows, most, from = {}, {}, tonumber(ARGV[3]), '-'
for i = 4, #ARGV do held[ARGV[i]] = true end
while #rows < most do
  local page = redis.call('XPENDING', KEYS[1], ARGV[1], from, '+', 500, ARGV[2])
  for _, row in ipairs(page) do
    if not held[row[1]] and #rows < most then rows[#rows + 1] = row end
  end
  if #page < 500 then break end
  from = '(' .. page[#page][1]
end
return {take(KEYS[1], ARGV[1], ARGV[2], rows, 'keep')}
