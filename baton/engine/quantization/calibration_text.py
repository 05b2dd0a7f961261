"""The text on which KV scales are measured unless another one is given.

Prose, dialogue, code, numbers, lists and other scripts, because the largest keys and values of a
head depend on the kind of token more than on the subject.
"""

from __future__ import annotations

CALIBRATION_TEXT = '''\
The ferry left at seven, a quarter of an hour late, because the crane had dropped a crate of lemons
into the harbour and three men in a rowing boat were fishing them out again one by one. Nobody on
the upper deck complained. The morning was windless, the water lay flat as tin, and the lemons,
bobbing between the hulls, gave the passengers something to count. Marta counted forty-one. She had
a notebook for such things: the number of swallows on a wire, the minutes between two church bells
that should have rung together, the colours of front doors in streets she would never see again.

"What do you do with all those numbers?" asked the boy beside her.
"I keep them," she said. "Later I compare."
"Compare with what?"
"With what I remember. Memory always rounds up."

By noon the island was in sight. It rose in two steps, a low green one with orchards and a high
grey one without anything at all, and between them ran a road so white that it seemed to be drawn
with chalk. According to the guide book, 2,314 people lived here in winter and nearly nine times as
many in August; there were two doctors, one cinema (closed), eleven chapels and a school whose roof
had been paid for by a lottery in 1958.

# How heat moves

Heat is transferred in three ways. In conduction, energy passes from molecule to molecule without
any of them travelling far; metals conduct well because their electrons are free to move. In
convection, a warm fluid rises and a cold one takes its place, which is why a radiator below a
window warms the whole room. In radiation, energy leaves a body as electromagnetic waves and needs
no medium: the power per area grows with the fourth power of the absolute temperature, P = s T^4,
where s = 5.67e-8 W/(m^2 K^4). A body at 600 K therefore radiates sixteen times as much as the same
body at 300 K. Which of the three dominates depends on size, temperature and what lies between.

1. Fill the kettle with 500 ml of water and weigh it.
2. Note the temperature, switch the kettle on and start the clock.
3. Stop when the water boils; a 2 kW kettle needs about 85 seconds from 20 degrees.
4. Multiply power by time and compare it with 4.19 kJ per litre and degree.

def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each run of `window` values; raises ValueError when there are too few."""
    if not 0 < window <= len(values):
        raise ValueError(f"window {window} is outside 1..{len(values)}")
    total = sum(values[:window])
    means = [total / window]
    for left, right in zip(values, values[window:]):
        total += right - left
        means.append(total / window)
    return means

for (int i = 0; i < n; ++i) {
    if (table[i].key == key && !table[i].deleted) return &table[i].value;  /* found */
}

SELECT city, COUNT(*) AS orders, ROUND(AVG(total), 2) FROM sales
WHERE placed_at >= '2024-01-01' GROUP BY city HAVING COUNT(*) > 10 ORDER BY orders DESC LIMIT 5;

{"id": 7, "name": "Ada", "tags": ["first", "second"], "active": true, "score": 0.731, "next": null}

| quarter | units | revenue | change |
|---|---|---|---|
| Q1 | 12,480 | $1,046,112.50 | +3.2% |
| Q2 | 11,907 | $998,201.00 | -4.6% |
| Q3 | 14,355 | $1,203,349.75 | +20.6% |

<|im_start|>user
Can you explain in two sentences why the sky is blue?<|im_end|>
<|im_start|>assistant
Sunlight is a mixture of all colours, and air scatters short waves far more strongly than long ones.
So blue light reaches us from every direction of the sky, while red light mostly passes straight
through, which is also why the setting sun looks red.<|im_end|>
<|im_start|>user
Write a haiku about rain, then translate "good morning" into five languages.<|im_end|>
<|im_start|>assistant
Rain taps on the sill,
counting what the night has kept;
the gutter answers.
Guten Morgen. Bonjour. Buenos dias. Buongiorno. Bom dia.<|im_end|>

Die Brücke über den Fluss wurde im Frühjahr gesperrt, weil zwei Pfeiler unterspült waren; seitdem
fährt der Bus einen Umweg von zwölf Kilometern. Les élèves ont planté trente arbres derrière
l'école, et presque tous ont survécu à l'hiver. El mercado abre a las seis, pero el pescado llega a
las cinco y los mejores puestos ya están ocupados. Корабль вышел из порта на рассвете. 今日は
とても天気がいいので、公園まで歩きましょう。 图书馆每天早上九点开门。 Καλημέρα σε όλους.

The defendant shall, within thirty (30) days of receipt of the notice referred to in Section 4.2(b),
either remedy the breach or propose in writing a plan for doing so; failing which the agreement
terminates automatically, without prejudice to any right accrued before the date of termination.

Dear Mr. Okafor, thank you for your letter of 3 March. We are sorry to hear that the second parcel
arrived damaged as well. A replacement left our warehouse today (tracking number ZX-0098-4471) and
should reach you by Friday. Please keep the broken lamp for a week in case the carrier wants to see
it. Kind regards, Ines

Theorem. There are infinitely many primes. Proof. Suppose p1, p2, ..., pn were all of them and let
N = p1 p2 ... pn + 1. No pi divides N, since each leaves the remainder 1. But N > 1 has a prime
factor, which is therefore none of the pi: a contradiction. QED

lol ok so i tried the thing u said & it WORKED!!! no idea why tho... gonna sleep now zzz :) #finally
https://example.org/docs/index.html?page=2&sort=asc#top  user@example.com  +1 (555) 010-9999
0 1 1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765 10946 17711 28657 46368 75025
'''
