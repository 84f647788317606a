//! Arm PL031 real-time clock (DDI 0224), for aarch64 guests.

use iommu::lock::LeafMutex;
use vm_superio::Rtc;

use crate::bus::BusDevice;

/// Bytes of MMIO space of the clock.
pub const RTC_LEN: u64 = 0x1000;

/// The clock. It reports the host's time of day plus the offset that the guest
/// set; its alarm never fires.
#[derive(Default)]
pub struct Pl031 {
    rtc: LeafMutex<Rtc<vm_superio::rtc_pl031::NoEvents>>,
}

impl Pl031 {
    /// A clock with the host's time of day.
    pub fn new() -> Self {
        Self::default()
    }
}

impl BusDevice for Pl031 {
    /// Registers are words: an access of another width reads zero.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut word = [0; 4];
        if let (Ok(offset), 4) = (u16::try_from(offset), data.len()) {
            self.rtc.lock().read(offset, &mut word);
            data.copy_from_slice(&word);
        } else {
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Ok(word)) = (u16::try_from(offset), data.try_into()) {
            self.rtc.lock().write(offset, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    fn word(rtc: &Pl031, offset: u64) -> u32 {
        let mut data = [0; 4];
        rtc.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_data_register_is_the_host_time_until_the_guest_loads_another() {
        let rtc = Pl031::new();
        let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(u64::from(word(&rtc, 0)) >= host.as_secs());
        rtc.write(8, &1_000_u32.to_le_bytes());
        assert!((1_000..2_000).contains(&word(&rtc, 0)));
    }

    #[test]
    fn the_peripheral_is_identified_as_a_pl031() {
        let rtc = Pl031::new();
        let id: Vec<u32> = (0..4).map(|i| word(&rtc, 0xfe0 + 4 * i)).collect();
        assert_eq!(id, [0x31, 0x10, 0x04, 0x00]);
    }

    #[test]
    fn other_widths_read_zero_and_write_nothing() {
        let rtc = Pl031::new();
        let mut data = [0xaa; 8];
        rtc.read(0, &mut data);
        assert_eq!(data, [0; 8]);
        rtc.write(8, &[1]);
        assert_ne!(word(&rtc, 0), 1);
    }
}
