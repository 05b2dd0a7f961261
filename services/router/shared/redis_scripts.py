"""What Redis does in one step. Redis runs a script alone, so every copy sees it whole or not.

The arithmetic is that of `ledger`; tests walk both side by side. Time is Redis' own unless a script
is given another (tests), so clocks of hosts do not matter. All numbers travel as text: Redis would
cut them to integers.

Values of the wrong type or shape are thrown away where they stand, the step goes on as if there
had been none, and the answer says so. All keys written here have a time to live.
"""

from __future__ import annotations

from baton.registry.redis_pump import GUARDED_CALL, Script

_PRELUDE = (
    GUARDED_CALL
    + """
local function number(text)
  local value = tonumber(text)
  if value == nil or value ~= value or value > 1e15 or value < -1e15 then return nil end
  return value
end
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
"""
)

_QUOTA = """
local function settled(key, stored, limit, elapsed)
  -- The level of a bucket now; nil without a limit.
  if limit < 0 then return nil end
  if not stored then return limit end
  local level = number(stored)
  if level == nil then
    garbage = key .. ': level ' .. string.sub(stored, 1, 40)
    return limit
  end
  return math.min(limit, level + limit * elapsed / 60)
end
local function open_ledger(key, request_limit, token_limit)
  local stored = call(key, 'HMGET', key, 'requests', 'tokens', 'at')
  local at = number(stored[3] or text(now))
  if at == nil then
    garbage = key .. ': time ' .. string.sub(stored[3], 1, 40)
    at = now
  end
  local elapsed = math.max(0, now - at)
  return settled(key, stored[1], request_limit, elapsed),
         settled(key, stored[2], token_limit, elapsed)
end
local function store_level(key, name, level, limit)
  if level == nil then
    redis.call('HDEL', key, name)
    return 0
  end
  redis.call('HSET', key, name, text(level))
  return (limit - level) * 60 / limit
end
local function close_ledger(key, requests, request_limit, tokens, token_limit)
  -- A full bucket is as good as none, so the key may go when both are.
  local fills_in = math.max(store_level(key, 'requests', requests, request_limit),
                            store_level(key, 'tokens', tokens, token_limit))
  redis.call('HSET', key, 'at', text(now))
  redis.call('PEXPIRE', key, math.floor(math.min(fills_in + 60, 86400) * 1000))
end
local function live_slots(key)
  call(key, 'ZREMRANGEBYSCORE', key, '-inf', text(now))
  -- Leases this long are nobody's: the clock was set back, or the value is damaged.
  redis.call('ZREMRANGEBYSCORE', key, '(' .. text(now + 86400), '+inf')
  return redis.call('ZCARD', key)
end
local function lease_slot(key, slot, ttl)
  redis.call('ZADD', key, text(now + ttl), slot)
  redis.call('PEXPIRE', key, math.floor(ttl * 1000) + 1000)
end
local function wait_for(level, limit, amount)
  if level == nil then return 0 end
  local missing = math.min(amount, limit) - level
  if missing <= 1e-6 then return 0 end
  return missing * 60 / limit
end
"""

TAKE = Script.of(
    _PRELUDE
    + _QUOTA
    + """
-- KEYS: ledger, slots. ARGV: now, limits of requests, tokens and concurrency (below 0: none),
-- requests, tokens, slot, time to live in s, time to wait for a slot in s.
-- Answer: granted, seconds to wait, limit that refuses, levels of requests and tokens, garbage.
local ledger, slots = KEYS[1], KEYS[2]
local request_limit, token_limit = tonumber(ARGV[2]), tonumber(ARGV[3])
local slot_limit = tonumber(ARGV[4])
local num_requests, num_tokens = tonumber(ARGV[5]), tonumber(ARGV[6])
local requests, tokens = open_ledger(ledger, request_limit, token_limit)
local wait, exceeded = 0, ''
if slot_limit >= 0 and live_slots(slots) >= slot_limit then
  wait, exceeded = tonumber(ARGV[9]), 'max_concurrent'
end
local request_wait = wait_for(requests, request_limit, num_requests)
if request_wait > wait then wait, exceeded = request_wait, 'requests_per_minute' end
local token_wait = wait_for(tokens, token_limit, num_tokens)
if token_wait > wait then wait, exceeded = token_wait, 'tokens_per_minute' end
local granted = 0
if wait == 0 then
  granted = 1
  if requests then requests = requests - num_requests end
  if tokens then tokens = tokens - num_tokens end
  if slot_limit >= 0 then lease_slot(slots, ARGV[7], tonumber(ARGV[8])) end
end
if requests or tokens then
  close_ledger(ledger, requests, request_limit, tokens, token_limit)
end
return {granted, text(wait), exceeded, requests and text(requests) or '',
        tokens and text(tokens) or '', garbage}
"""
)

REFUND = Script.of(
    _PRELUDE
    + _QUOTA
    + """
-- KEYS: ledger and slots of each refund. ARGV: now, then of each refund: limits of requests and
-- tokens (below 0: none), requests, tokens, slot, '1' when only a held slot is refunded.
-- Answer: garbage.
for i = 1, #KEYS / 2 do
  local ledger, slots = KEYS[2 * i - 1], KEYS[2 * i]
  local at = 2 + 6 * (i - 1)
  local request_limit, token_limit = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local was_held = false
  if ARGV[at + 4] ~= '' then
    live_slots(slots)
    was_held = redis.call('ZREM', slots, ARGV[at + 4]) == 1
  end
  if was_held or ARGV[at + 5] ~= '1' then
    local requests, tokens = open_ledger(ledger, request_limit, token_limit)
    if requests then requests = math.min(request_limit, requests + tonumber(ARGV[at + 2])) end
    if tokens then tokens = math.min(token_limit, tokens + tonumber(ARGV[at + 3])) end
    if requests or tokens then
      close_ledger(ledger, requests, request_limit, tokens, token_limit)
    end
  end
end
return garbage
"""
)

BEAT = Script.of(
    _PRELUDE
    + """
-- KEYS: copies. ARGV: now, copy, time to live in s. Answer: live copies, garbage.
local copies, ttl = KEYS[1], tonumber(ARGV[3])
call(copies, 'ZREMRANGEBYSCORE', copies, '-inf', text(now))
redis.call('ZREMRANGEBYSCORE', copies, '(' .. text(now + 86400), '+inf')
redis.call('ZADD', copies, text(now + ttl), ARGV[2])
redis.call('PEXPIRE', copies, math.floor(ttl * 1000) + 1000)
return {redis.call('ZCARD', copies), garbage}
"""
)

RENEW = Script.of(
    _PRELUDE
    + _QUOTA
    + """
-- KEYS: slots of each tenant. ARGV: now, time to live in s, then pairs: number of the key, slot.
-- Answer: garbage.
local ttl = tonumber(ARGV[2])
for i = 1, #KEYS do live_slots(KEYS[i]) end
for i = 3, #ARGV, 2 do lease_slot(KEYS[tonumber(ARGV[i])], ARGV[i + 1], ttl) end
return garbage
"""
)
