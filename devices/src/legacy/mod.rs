//! Devices that are not on PCI: serial port, clocks, power control.

mod cmos;
mod power;
mod rtc;
mod serial;

pub use cmos::{CMOS_LEN, Cmos};
pub use power::{
    KEYBOARD_RESET_LEN, KeyboardReset, POWER_LEN, POWER_OFF_SLEEP_TYPE, Power, PowerRequest,
    RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET,
};
pub use rtc::{Pl031, RTC_LEN};
pub use serial::{SERIAL_LEN, SerialCounters, SerialPort, SerialSink};
