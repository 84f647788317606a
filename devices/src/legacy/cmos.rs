//! MC146818 real-time clock and CMOS memory, for x86_64 guests.
//!
//! Linux probes this clock on every platform. Without one it spends tens of
//! thousands of exits waiting for the update-in-progress bit of an all-ones
//! register A to clear. This clock reports the time of day only: it has no
//! alarm and no interrupts, and the time cannot be set.

use std::time::{SystemTime, UNIX_EPOCH};

use iommu::lock::LeafMutex;

use crate::bus::BusDevice;

/// Bytes of I/O space: the index port, then the data port.
pub const CMOS_LEN: u64 = 2;

const INDEX: u64 = 0;
const DATA: u64 = 1;

/// Mask of the index: bit 7 of the index port masks the NMI.
const INDEX_MASK: u8 = 0x7f;

/// Register A: 32.768 kHz time base, periodic rate 1,024 Hz, no update in
/// progress.
const REGISTER_A: u8 = 0x26;
/// Register B: 24-hour mode, BCD, no interrupt enabled.
const REGISTER_B: u8 = 0x02;
/// Register D: the time is valid.
const REGISTER_D: u8 = 0x80;

/// The clock, with an index and a data port (0x70 and 0x71).
#[derive(Default)]
pub struct Cmos {
    index: LeafMutex<u8>,
}

impl Cmos {
    /// A clock with the host's time of day, in UTC.
    pub fn new() -> Self {
        Self::default()
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA, [value]) = (offset, data) {
            let index = *self.index.lock();
            // A host clock set before 1970 reads as 1970.
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
            *value = register(index, since_epoch.unwrap_or_default().as_secs());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (INDEX, &[value]) = (offset, data) {
            *self.index.lock() = value & INDEX_MASK;
        }
    }
}

/// Value of register `index` at `now`, in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let days = now / 86_400;
    let (year, month, day) = civil_date(days);
    match index {
        0x00 => bcd(now % 60),
        0x02 => bcd(now / 60 % 60),
        0x04 => bcd(now / 3_600 % 24),
        // 1 January 1970 was a Thursday; Sunday is day 1.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x0a => REGISTER_A,
        0x0b => REGISTER_B,
        0x0d => REGISTER_D,
        0x32 => bcd(year / 100 % 100),
        _ => 0,
    }
}

/// The year, month (1 to 12) and day of the month (1 to 31) of a day counted
/// from 1 January 1970, in the Gregorian calendar.
fn civil_date(days: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    // Years are counted from 1 March 1600, so that a leap day ends its year.
    let days = days + 135_080;
    let (cycles, days) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let centuries = (days / 36_524).min(3);
    let days = days - centuries * 36_524;
    let leaps = (days / 1_461).min(24);
    let days = days - leaps * 1_461;
    let years = (days / 365).min(3);
    let days = days - years * 365;
    let year = 1600 + cycles * 400 + centuries * 100 + leaps * 4 + years;
    // Five months from March have 153 days, and so have the next five.
    let month = (5 * days + 2) / 153;
    let day = days - (153 * month + 2) / 5 + 1;
    if month < 10 {
        (year, month + 3, day)
    } else {
        (year + 1, month - 9, day)
    }
}

/// Encodes two decimal digits, one per nibble.
fn bcd(value: u64) -> u8 {
    let digits = value % 100;
    u8::try_from(digits / 10 * 16 + digits % 10).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Year, month, day, hour, minute, second, weekday as the guest reads them.
    fn clock(now: u64) -> [u8; 8] {
        [0x32, 9, 8, 7, 4, 2, 0, 6].map(|index| register(index, now))
    }

    #[test]
    fn the_time_is_bcd_in_utc() {
        // `date -u -d @N '+%C %y %m %d %H %M %S'` and the day of the week.
        for (now, expected) in [
            (0, [0x19, 0x70, 0x01, 0x01, 0, 0, 0, 5]),
            (951_782_399, [0x20, 0x00, 0x02, 0x28, 0x23, 0x59, 0x59, 2]),
            (951_782_400, [0x20, 0x00, 0x02, 0x29, 0, 0, 0, 3]),
            (1_709_164_800, [0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5]),
            (1_785_542_399, [0x20, 0x26, 0x07, 0x31, 0x23, 0x59, 0x59, 6]),
            (4_107_542_400, [0x21, 0x00, 0x03, 0x01, 0, 0, 0, 2]),
        ] {
            assert_eq!(clock(now), expected, "{now}");
        }
    }

    #[test]
    fn every_day_follows_the_day_before() {
        let mut before = civil_date(0);
        assert_eq!(before, (1970, 1, 1));
        for days in 1..200_000 {
            let (y, m, d) = civil_date(days);
            let next_day = (y, m) == (before.0, before.1) && d == before.2 + 1;
            let next_month = y == before.0 && m == before.1 + 1 && d == 1 && before.2 >= 28;
            let next_year =
                y == before.0 + 1 && (m, d) == (1, 1) && (before.1, before.2) == (12, 31);
            assert!(
                next_day || next_month || next_year,
                "{before:?} then {y}-{m}-{d}"
            );
            before = (y, m, d);
        }
    }

    #[test]
    fn an_update_is_never_in_progress_and_the_time_is_valid() {
        let cmos = Cmos::new();
        let read = |index: u8| {
            cmos.write(INDEX, &[index | 0x80]);
            let mut data = [0];
            cmos.read(DATA, &mut data);
            data[0]
        };
        assert_eq!(read(0x0a) & 0x80, 0);
        assert_eq!(read(0x0b) & 0x06, 0x02);
        assert_eq!(read(0x0d), 0x80);
        cmos.write(DATA, &[0x55]);
        assert_eq!(read(0x0d), 0x80);
        assert_eq!(read(0x7f), 0);
    }
}
