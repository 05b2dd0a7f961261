"""What Redis does in one step for the registry; see `redis_registry` for the keys.

The time is Redis' own. Keys of a wrong type are thrown away where they stand. The epoch that is
registered is the only one that may renew or leave; an epoch that was replaced may register again
only when its replacement is gone.
"""

from __future__ import annotations

from baton.registry.redis_pump import GUARDED_CALL, Script

_PRELUDE = (
    GUARDED_CALL
    + """
local info, lease, version, generation = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local function keep(key, ttl)
  -- At least as long as what was just written; others may need it longer.
  local wanted = math.floor(ttl * 1000) + 1000
  if redis.call('PTTL', key) < wanted then redis.call('PEXPIRE', key, wanted) end
end
local function changed(channel)
  -- Time, so that a Redis that starts anew gives no version a second time.
  local last = tonumber(call(version, 'GET', version) or '0') or 0
  local next_version = math.max(last + 1, math.floor(now * 1e6))
  redis.call('SET', version, string.format('%.0f', next_version), 'PX', 86400000)
  redis.call('PUBLISH', channel, 'changed')
end
local function registered(id)
  -- The epoch and the time to live of a live registration.
  local ends = tonumber(call(lease, 'ZSCORE', lease, id) or '0') or 0
  if ends <= now then return nil end
  local data = call(info, 'HGET', info, id)
  if not data then return nil end
  local known, value = pcall(cjson.decode, data)
  if not known or type(value) ~= 'table' or type(value.info) ~= 'table' then return nil end
  return value.info.epoch, tonumber(value.ttl_s)
end
"""
)

REGISTER = Script.of(
    _PRELUDE
    + """
-- KEYS: as above, then past epochs of the worker. ARGV: channel, id, epoch, JSON, time to live.
-- Answer: 1 when a newer epoch is registered and nothing was done.
local past = KEYS[5]
local channel, id, epoch, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])
call(past, 'ZREMRANGEBYSCORE', past, '-inf', text(now))
local other = registered(id)
if other ~= nil and other ~= epoch then
  if redis.call('ZSCORE', past, epoch) then return 1 end
  redis.call('ZADD', past, text(now + 86400), tostring(other))
  redis.call('ZREMRANGEBYRANK', past, 0, -65)
  redis.call('PEXPIRE', past, 86400000)
end
redis.call('ZREM', past, epoch)
-- The time to live rides along, so that renewing needs no more than id and epoch.
local data = string.sub(ARGV[4], 1, -2) .. ', "ttl_s": ' .. text(ttl) .. '}'
call(info, 'HSET', info, id, data)
call(lease, 'ZADD', lease, text(now + ttl), id)
keep(info, ttl)
keep(lease, ttl)
changed(channel)
return 0
"""
)

RENEW = Script.of(
    _PRELUDE
    + """
-- ARGV: id, epoch. Answer: 1 when the lease starts anew.
local epoch, ttl = registered(ARGV[1])
if epoch ~= ARGV[2] or ttl == nil or not (ttl > 0 and ttl <= 86400) then return 0 end
redis.call('ZADD', lease, text(now + ttl), ARGV[1])
keep(info, ttl)
keep(lease, ttl)
return 1
"""
)

DEREGISTER = Script.of(
    _PRELUDE
    + """
-- ARGV: channel, id, epoch.
if registered(ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('HDEL', info, ARGV[2])
redis.call('ZREM', lease, ARGV[2])
changed(ARGV[1])
return 1
"""
)

LIST = Script.of(
    _PRELUDE
    + """
-- ARGV: channel, the version that the reader knows.
-- Answer: generation, version, garbage, 1 when nothing has changed, then pairs of id and JSON.
local ended = call(lease, 'ZRANGEBYSCORE', lease, '-inf', text(now), 'LIMIT', 0, 1000)
for _, id in ipairs(ended) do
  redis.call('ZREM', lease, id)
  call(info, 'HDEL', info, id)
end
-- Nobody leases for longer: the clock was set back, or the value is damaged.
local endless = redis.call('ZREMRANGEBYSCORE', lease, '(' .. text(now + 86400 + 60), '+inf')
if #ended > 0 or endless > 0 then changed(ARGV[1]) end
local mark = call(generation, 'GET', generation)
if not mark then
  mark = time[1] .. '.' .. time[2]
  redis.call('SET', generation, mark)
end
redis.call('PEXPIRE', generation, 86400000)
local current = call(version, 'GET', version) or '0'
if garbage == '' and current == ARGV[2] then return {mark, current, garbage, 1} end
local reply = {mark, current, garbage, 0}
local ids = redis.call('ZRANGE', lease, 0, 9999)
for _, id in ipairs(ids) do
  local data = call(info, 'HGET', info, id)
  if data then
    reply[#reply + 1] = id
    reply[#reply + 1] = data
  end
end
reply[3] = garbage
return reply
"""
)
